"""What a model costs before it is trained: parameters, operations and memory.

In reading order:

- `flops`: parameter counts and floating-point operations, from the modules on the meta device.
- `costs`: parameters by component, bytes of training and of the key/value cache, and the reach of a sliding window.
- `figures`: all of these figures for one model, in one dictionary.
"""
