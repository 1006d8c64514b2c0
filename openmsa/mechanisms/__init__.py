"""Mechanisms, shaped by papers: one file each, the same headings in the same order."""
