"""The EMMA network: `nn.Module`s, their configuration, and loading and saving of weight files.

Comments and docstrings give the shapes of tensors, such as `x [b, l, d]`. Each letter names an axis:

    b   batch: sequences or images
    n   visual tokens, one per patch of the image
    t   text tokens
    l   positions of a sequence: the visual tokens, then the text tokens (l = n + t)
    d   width of the language model (`d_model`)
    v   width of the vision features: channels of all towers together

Inside attention, Mamba mixers and their kernels:

    c   channels of a mixer (`d_inner`), or of its convolution
    h   heads
    p   channels per head (`head_dim`)
    k   state size of the scan (`d_state`)
    g   groups of heads that share B and C (`num_groups`)

Inside the chunked scan of Mamba-2 (`model.kernels.reference.ssd`):

    m   chunks
    q   positions per chunk
    r   heads per group (r = h / g)

A, B, C, D, x, y, z and dt are tensors, named as in the Mamba papers. Other names in shapes are words or parameters,
such as `vocab`, `d_conv` or `SUMS`.
"""
