"""Program text that makes a test process obey file permissions, even if it runs as root."""

# Without the capabilities CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2), root may read only what its files allow.
OBEY_PERMISSIONS = """
import ctypes
libc = ctypes.CDLL(None)
header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(header, capabilities)
capabilities[0] &= ~0b110  # the first of three words, per half: effective, permitted, inheritable
libc.capset(header, capabilities)
"""
