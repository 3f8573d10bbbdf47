"""The network: `nn.Module`s, their configuration, and files of weights.

Axis letters, used throughout: `b` batch, `n` visual tokens, `t` text tokens, `l = n + t`, `d` model width,
`s` tapped depths, `v` vision width, `p` values of one alignment target, `h` heads.
"""
