"""How many bytes of glibc's heap a process uses."""

from __future__ import annotations

import ctypes
import gc


class _MallocInfo(ctypes.Structure):
    """mallinfo2 of glibc."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


try:
    _mallinfo = ctypes.CDLL(None).mallinfo2
    _mallinfo.restype = _MallocInfo
except AttributeError:
    _mallinfo = None

KNOWN = _mallinfo is not None


def used() -> int:
    """Bytes of the heap, mapped blocks included; where KNOWN, that is with glibc 2.33."""
    gc.collect()
    info = _mallinfo()
    return info.uordblks + info.hblkhd
