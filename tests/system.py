"""A system that cannot do something: a filter lets the kernel answer some calls of this process with an
error.

So do file systems of networks, for the calls that they do not know.
"""

import ctypes
import platform
import struct
import sys

CALLS = {"mmap": 9, "fsync": 74, "fdatasync": 75, "fcntl": 72, "fallocate": 285}  # their numbers on x86-64
ARGUMENTS = {
    "mmap": (3, 0x21, 0x01),
    "fcntl": (1, 0xFFFF, 6),
}  # only shared maps of files; only locks (F_SETLK)
FILTERS = sys.platform == "linux" and platform.machine() == "x86_64"
LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_void_p)]


def refuse(calls):
    """From now on, and for good, the kernel answers {name in CALLS: errno} in this process and those that it
    starts.
    """
    if not calls:
        return
    rules = []
    for name, errno in calls.items():
        argument, mask, value = ARGUMENTS.get(name, (0, 0, 0))
        checked = [
            struct.pack("HBBI", LOAD, 0, 0, 16 + 8 * argument),
            struct.pack("HBBI", AND, 0, 0, mask),
            struct.pack("HBBI", EQUAL, 0, 1, value),
            struct.pack("HBBI", RETURN, 0, 0, ERRNO | errno),
        ]
        rules.append(struct.pack("HBBI", LOAD, 0, 0, 0))
        rules.append(struct.pack("HBBI", EQUAL, 0, len(checked), CALLS[name]))
        rules += checked
    rules.append(struct.pack("HBBI", RETURN, 0, 0, ALLOW))
    memory = ctypes.create_string_buffer(b"".join(rules))
    program = _Program(len(rules), ctypes.addressof(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_rights, filter_calls = 38, 22
    assert libc.prctl(no_new_rights, 1, 0, 0, 0) == 0
    assert libc.prctl(filter_calls, 2, ctypes.byref(program), 0, 0) == 0
