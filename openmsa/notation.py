"""The letters of this package, and six papers' letters translated into them.

One legend serves shapes in docstrings, names in code and errors. A mechanism file uses these
letters only, whatever its paper calls things.
"""

from __future__ import annotations

LEGEND = {
    "b": "batch",
    "t": "query tokens",
    "s": "key tokens; queries are the last t of them",
    "h": "query heads",
    "g": "groups: KV heads; head i belongs to group i // r",
    "r": "heads of a group, h / g",
    "d": "channels of a head (d_value, d_index where they differ)",
    "n": "blocks, ceil(s / block_size)",
    "k": "blocks kept per query token and group (top_k)",
}

# paper: {its sign: ours}. A sign that names a quantity we call by a word is given that word.
PAPERS = {
    "MSA (arXiv 2606.13392)": {
        "N": "s",
        "H_q": "h",
        "H_kv": "g",
        "G": "r",
        "r": "a group, 0 ... g - 1",
        "d_h": "d",
        "d_idx": "d_index",
        "B_k": "block_size",
        "B": "n",
        "k": "k",
        "I(i, r)": "Selection.blocks[:, r, i]",
        "S_idx": "index score",
        "M_idx": "block score",
        "sg": "detach",
    },
    "NSA (arXiv 2502.11089)": {
        "t": "s",
        "h": "h / g, the heads that share a KV head",
        "d_k": "d",
        "d_v": "d_value",
        "l": "kernel: tokens of a window that becomes one key",
        "d": "stride: tokens from one such window to the next",
        "l'": "block_size",
        "n": "k",
        "w": "window, in tokens",
        "g_c": "gates[..., c]",
    },
    "MoBA (arXiv 2502.13189)": {
        "N": "s",
        "n": "n",
        "B": "block_size",
        "k": "k, the query's own block included",
        "I_i": "keys of block i",
        "s_i": "block score: q . mean key of block i",
    },
    "InfLLM-V2 (arXiv 2509.24663)": {
        "n": "s",
        "h_q": "h",
        "h_kv": "g",
        "G": "r",
        "d_h": "d",
        "B": "block_size",
        "|I(i)|": "k, forced blocks included",
        "l_C1": "tokens in a compressed block",
        "s_C1": "stride between compressed blocks, in tokens",
        "N_init": "sink_blocks",
        "N_local": "local_blocks",
    },
    "DSA (DeepSeek-V3.2-Exp, arXiv 2512.02556)": {
        "L": "s",
        "t, s": "a query token, a key token",
        "H_I": "index heads",
        "d_I": "d_index",
        "q_I": "q_index",
        "k_I": "k_index",
        "w_I": "weight of an index head",
        "I(t, s)": "index score",
        "k": "k, with block_size 1",
    },
    "GQA (arXiv 2305.13245)": {
        "H": "h",
        "G": "g",
        "H / G": "r",
    },
}
