"""What compat adds to torch."""

import ctypes
import hashlib
import sys
import threading
import time

import pytest

from tedcompile import compat


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_end_waits_for_gloo():
    done = []

    def late():
        ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop")  # PR_SET_NAME
        started.set()
        data = bytes(1 << 20)
        for _ in range(200):  # works without the interpreter's lock
            hashlib.sha512(data).digest()
        done.append(True)

    started = threading.Event()
    thread = threading.Thread(target=late)
    thread.start()
    started.wait()
    compat.settle_gloo()
    assert done
    thread.join()
    begin = time.monotonic()
    compat.settle_gloo()
    assert time.monotonic() - begin < 2
