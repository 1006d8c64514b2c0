"""Mechanisms, shaped by papers: one file each, the same headings in the same order.

Config: the numbers that define it. REMEMBERS: what a cache keeps per token. select: which blocks a
query reads. attend: what it makes of them. loss: what teaches the selection. Last, the one call.
A mechanism imports operations and never another mechanism.
"""
