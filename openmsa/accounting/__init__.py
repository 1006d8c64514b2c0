"""What an operation costs by count (FLOPs, bytes), what a machine gives, and how they compare."""
