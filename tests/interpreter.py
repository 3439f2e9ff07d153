"""Triton's interpreter with two of its look-ups remembered: a quarter of the time of the tests.

At every call of every function it asks each member of `triton.language` whether it is a builtin,
and at every operation it makes its table of dtypes anew.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def names_of_builtins(package):
    return [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]


def patch_builtin(package, builder, scope):
    for name in names_of_builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # else it is patched already
            interpreter._patch_attr(package, name, member, builder, scope)


@functools.cache
def np_dtype_of(dtype, find=interpreter._get_np_dtype):
    return find(dtype)


def np_dtype(dtype):
    element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    if isinstance(element, tl.pointer_type):  # which has no hash
        return np.dtype(np.uint64)
    return np_dtype_of(element)


def remember():
    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, np_dtype
