"""A little training after the conversion: the converted model learns from the dense one."""
