"""Shared by all commands: absl flags, one-line errors, exit codes, and logging.

Importing this module imports neither JAX nor TensorFlow, so --help and flag errors are quick.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from imagen_jax.common import typed_config
from imagen_jax.common.buckets import PACKAGES
from imagen_jax.common.errors import BAD_INPUT, RunError, UserError

# Logger of the project's own messages. Libraries use absl's, which shows only warnings.
log = logging.getLogger("imagen_jax")

# Lists the flags defined here in the --help of the program that defines them.
flags.disclaim_key_flags()


def define_config_flags(default: str | None, help_text: str) -> None:
    """Defines --config and --set, the arguments of typed_config.load."""
    flags.DEFINE_string("config", default, help_text)
    flags.DEFINE_multi_string(
        "set", [], "key=value to override a config key; --config.key=value does the same."
    )


def define_cascade_flags(default: str = "the only run in runs/") -> None:
    """Defines --workdir and --step, the arguments of cascade.load.

    Args:
      default: what the command reads without --workdir, in words.
    """
    flags.DEFINE_list(
        "workdir",
        None,
        "Directory of a run of imagen_jax.train or of an export; several, in order, are a cascade "
        f"(default: {default}).",
    )
    flags.DEFINE_integer("step", None, "Checkpoint step to load (default: the newest).")


def define_cache_flag() -> None:
    """Defines --compilation_cache, the argument of compilation.use_cache."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Directory that keeps compiled programs for later runs; an empty value turns the cache off "
        "(default: $JAX_COMPILATION_CACHE_DIR, else ~/.cache/imagen_jax/xla).",
    )


def parse_numbers(flag: str, words: Sequence[str]) -> list[float]:
    """Parses the values of a list flag.

    Raises:
      UserError: there are none, or one is not a finite number from 0 up.
    """
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or any(n < 0 or not math.isfinite(n) for n in numbers):
        raise UserError(f"--{flag} is {','.join(words)!r}; allowed: numbers from 0 up")
    return numbers


def expand_config_flags(argv: Sequence[str]) -> list[str]:
    """Writes each --config.KEY=VALUE as --set=KEY=VALUE, which absl can parse."""
    return [re.sub("^--config[.]", "--set=", word) for word in argv]


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; rejects positional arguments, which absl would ignore.

    --config.model.embed_dim=64 is short for --set=model.embed_dim=64, and -h for --help.
    """
    if "set" in flags.FLAGS:
        argv = expand_config_flags(argv)
    argv = ["--help" if a == "-h" else a for a in argv]
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        fail(_unknown_flag(e.flagname, e.flagvalue))
    except flags.Error as e:
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(e))
        fail(f"--{missing[1]} is needed (see --help)" if missing else str(e).replace("\n", " "))
    except SystemExit:  # absl exits with 1 after printing the help
        sys.exit(0)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value (see --help)")
    return rest


def _unknown_flag(name: str, argument: str) -> str:
    """Returns the message for an unknown flag, which suggests the closest flag or config key.

    Args:
      name: the flag without dashes or value, such as "num_steps" or "model.embed_dim".
      argument: the whole argument, such as "--num_steps=10".
    """
    spellings = {flag: [f"--{flag}"] for flag in flags.FLAGS}
    for key in _config_keys():
        for alias in {key, key.rpartition(".")[2]}:
            spellings.setdefault(alias, []).append(f"--config.{key}")
    near = [name] if name in spellings else difflib.get_close_matches(name, spellings, n=1)
    if near:
        _, equals, value = argument.partition("=")
        choices = [spelling + equals + value for spelling in spellings[near[0]]]
        return f"--{name} is not a flag; did you mean {' or '.join(choices)}? (see --help)"
    keys = "; config keys are written --config.KEY=VALUE" if "config" in flags.FLAGS else ""
    return f"--{name} is not a flag (see --help){keys}"


def _config_keys() -> list[str]:
    """Returns the dotted keys that the --config file sets, least nested first; [] if none."""
    file = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if not file:
        return []
    try:
        return sorted(typed_config.keys(typed_config.load(file)), key=lambda key: key.count("."))
    except UserError:  # the unknown flag is reported first
        return []


def fail(message: str, code: int = BAD_INPUT) -> None:
    """Prints `error: message` to stderr and exits with `code`."""
    with above_bars():
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def above_bars() -> Iterator[None]:
    """Clears tqdm's progress bars for the block and redraws them below what it prints."""
    tqdm = sys.modules.get("tqdm")  # if it was never imported, there is no bar
    with tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm else contextlib.nullcontext():
        yield


class _Handler(logging.StreamHandler):
    """Handler that writes log lines to stderr without breaking progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars():
            super().emit(record)


def _set_up_log() -> None:
    """Prints messages as they are, and prefixes libraries' warnings with the logger's name."""
    for logger, line in ((log, "%(message)s"), (logging.getLogger(), "%(name)s: %(message)s")):
        handler = _Handler()
        handler.setFormatter(logging.Formatter(line))
        logger.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.captureWarnings(True)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Discards what native libraries print to stderr while they load; exceptions still propagate.

    TensorFlow, which only reads data here, reports every accelerator library that it cannot find.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _quiet_libtpu() -> None:
    """Silences libtpu on a machine without a TPU, where it is installed only for planning.

    JAX tries libtpu whenever it looks for devices, and libtpu logs at length that it cannot
    determine its topology. With these variables set, it quietly finds no device. Every TPU VM has
    one of the two paths.
    """
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` as a program.

    Exit codes: 0 after --help, 2 and one line on stderr after a UserError, the error's own
    code and one line after a RunError, 130 after Ctrl-C.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _quiet_libtpu()
    absl_logging.set_verbosity(absl_logging.WARNING)

    def guarded(argv: Sequence[str]) -> None:
        _set_up_log()  # here, because app.run installs absl's own handler first
        try:
            main(argv)
        except (UserError, RunError) as e:
            fail(str(e), e.code)
        except ImportError as e:
            # fsspec found no package for a path in a bucket, and says which one to install.
            if getattr(e.__cause__, "name", None) not in PACKAGES.values():
                raise
            fail(f"{e}, with: pip install {e.__cause__.name}")
        except KeyboardInterrupt:
            with above_bars():
                print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)
