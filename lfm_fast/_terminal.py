"""What the programs take from a terminal and say to it: flags; warnings and what is missing as sentences."""

import argparse
import contextlib
import difflib
import os
import sys
import textwrap
import warnings

_FITS_A_LINE = 60  # letters of a list of choices
_TO_INSTALL = {"PIL": "pillow"}  # packages that pip knows by another name than Python


class _Formatter(argparse.HelpFormatter):
    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # names are copied from here


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is not buried under a list of all flags, and which knows what a misspelt one may mean.

    >>> parser = Parser(prog="draw")
    >>> _ = parser.add_argument("--num-images", type=int)
    >>> parser.unknown("--num_image")
    'there is no flag --num_image; did you mean --num-images?'
    """

    def __init__(self, *, usage="%(prog)s [--help] [--FLAG VALUE ...]", **settings):
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=_Formatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """What the parent of sub-commands calls for each of them: here they complain of their flags by themselves."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self.unknown(next((word for word in rest if word.startswith("--")), rest[0])))
        return known, rest

    def unknown(self, word):
        """The sentence about a word of the command line that nothing asked for."""
        if not word.startswith("-"):
            return f"{word!r} belongs to no flag"
        given = word.split("=")[0]
        meant, flags = given.lower().replace("_", "-"), [f for f in self._option_string_actions if f.startswith("--")]
        near = [flag for flag in flags if flag.startswith(meant) or _initials(flag) == meant[2:]][:3]
        near = near or difflib.get_close_matches(meant, flags, n=2, cutoff=0.7)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists those there are"
        return f"there is no flag {given}; {hint}"


def _initials(flag):
    """Of a flag of several words: "lr" is what many call the learning rate."""
    words = flag[2:].split("-")
    return "".join(word[0] for word in words) if len(words) > 1 else None


def one_of(names, says):
    """Arguments of `add_argument` that tell what there is to choose from: in the flag's line if short."""
    listed = "{" + ",".join(names) + "}"
    if len(listed) <= _FITS_A_LINE:
        return {"metavar": listed, "help": says}
    return {"metavar": "NAME", "help": f"{says}; one of {', '.join(names)}"}


@contextlib.contextmanager
def plain_warnings(program):
    """Context in which a warning is its sentence alone, after the program's name: the line of code says nothing."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"{program}: {message}", file=sys.stderr)
        yield


def start(program, run):
    """The exit status of the program `run()`. Warnings are sentences, and so is a package that this Python has not got.

    Letters that the terminal cannot show are spelt out. Where who reads has gone, as with `| head`, no more is said.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with plain_warnings(program):
            status = run()
            sys.stdout.flush()  # Python would do so at its exit, and complain there
        return status
    except BrokenPipeError:
        stop_printing()
        return 141
    except ModuleNotFoundError as error:
        name = (error.name or "lfm_fast").partition(".")[0]
        if name == "lfm_fast" or sys.modules.get(name) is not None:
            raise  # the package is there, and a part of it is not: a mistake of ours, or versions that do not fit
        says = f"the package {_TO_INSTALL.get(name, name)} is not installed in this Python, {sys.executable}"
        print(f"{program}: {says}; install it there, or use the Python that has it", file=sys.stderr)
        return 1
    except OSError as error:  # of the output itself, a full disk, which has no name; or of a file
        stop_printing()
        of = "" if error.filename is None else f": {error.filename}"
        print(f"{program}: {error.strerror or error}{of}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while modules are imported, too: that takes seconds
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def stop_printing():
    """What is printed from here on goes nowhere."""
    with contextlib.suppress(OSError):  # no file of the system's, as in a notebook
        output = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != output:  # as where the output had been closed
            os.dup2(nowhere, output)
            os.close(nowhere)
