"""The table of methods: name -> (module in `hf_bnn.methods`, class). It imports nothing.

A new method is one file in `hf_bnn/methods`, one row here, and its test. `hf_bnn.methods` fills METHODS from this
table, and the public names of `hf_bnn` and `hf_bnn.methods` follow it. `import hf_bnn` reads the table and loads no
method.
"""

METHOD_TABLE = {
    "ste": ("ste", "STE"),
    "approx_sign": ("approx_sign", "ApproxSign"),
    "xnor": ("xnor", "XNOR"),
    "dorefa": ("dorefa", "DoReFa"),
    "ir_net": ("ir_net", "IRNet"),
    "reste": ("reste", "ReSTE"),
    "surge": ("surge", "Surge"),
    "stompp": ("stompp", "Stompp"),
    "fsg": ("fsg", "Fsg"),
    "metaquant": ("metaquant", "MetaQuant"),
}
METHOD_CLASSES = tuple(cls for _, cls in METHOD_TABLE.values())
