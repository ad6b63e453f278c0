"A shell that runs the tests in the background has Ctrl-C ignored, and what they start would inherit that."

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
