"""Dense grouped-query attention: the baseline.

O[t, h] = softmax over every visible s of (q[t, h] . k[s, h // r] / sqrt(d)) @ v[s, h // r]
"""

from __future__ import annotations

# ---- Remembers: what the cache keeps per token
REMEMBERS = ("k", "v")
