"""What the programs here do with an error: one clear line and an exit status, no traceback."""

import functools
import signal
import sys


def one_line(name):
    """Of main(argv): -> exit status 0; 2 bad input; 1 disk, memory or processes; 130 stopped."""
    def wrap(main):
        @functools.wraps(main)
        def guarded(argv=None):
            previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
            try:
                return main(argv) or 0
            except KeyboardInterrupt:
                print(f"{name}: stopped", file=sys.stderr)
                return 130
            except (ValueError, OverflowError, OSError, RuntimeError, MemoryError) as error:
                print(f"{name}: error: " + " ".join(str(error).split()), file=sys.stderr)
                return 2 if isinstance(error, (ValueError, OverflowError)) else 1
            finally:
                signal.signal(signal.SIGTERM, previous)

        return guarded

    return wrap
