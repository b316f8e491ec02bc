"""What a user types and sees: options, report, progress."""

import signal
import sys
from pathlib import Path

from cogvideox.files.names import ROOT

# Until a script of ours receives signals itself, Ctrl-C ends it without a traceback out of some import.
_script = getattr(sys.modules["__main__"], "__file__", None)
if _script and Path(_script).resolve().parent == ROOT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
