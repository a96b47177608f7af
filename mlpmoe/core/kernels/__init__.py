"""The fast paths, each beside the plain torch form that it has to agree with.

`rows`: torch's own ways to read rows in place. `compiled`: one token, compiled by numba, an
optional extra (`mlpmoe[fast]`); `arrays`, `one_token` and `decoder` bind it to models, `choice`
tries it once per shape. Its reference is what the modules compute for many tokens, in torch.
`gpu`: the same choice on a GPU, of kernels by triton, which comes with torch there:
`triton_kernels`, run by `launches`. MLPMOE_KERNELS=plain in the environment turns all of it off.
"""
