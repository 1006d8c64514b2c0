"""Evidence: perplexity by position, retrieval, recall of the index, and the page of it all."""
