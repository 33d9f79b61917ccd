"""What every command line shares: absl flags, one-line errors, exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from imagen_jax.common.errors import UserError

BAD_INPUT = 2

# What people watch; libraries' chatter goes to absl's logger, which stays at warnings.
log = logging.getLogger("imagen_jax")

# The flags defined here are in the --help of the program that has them defined.
flags.disclaim_key_flags()


def define_config_flags(default: str | None, help_text: str) -> None:
    """Defines --config, and --set for what overrides its keys; config.load takes both."""
    flags.DEFINE_string("config", default, help_text)
    flags.DEFINE_multi_string(
        "set", [], "key=value that overrides the config; --config.key=value is the same."
    )


def define_cache_flag() -> None:
    """Defines --compilation_cache, for programs that call compilation.use_cache with it."""
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder for compiled programs, which later runs then need not compile; by default "
        "$JAX_COMPILATION_CACHE_DIR or else ~/.cache/imagen_jax/xla. Empty for none.",
    )


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags and rejects leftover positional arguments, which absl would ignore.

    --config.model.embed_dim=64 is short for --set=model.embed_dim=64.
    """
    argv = [a.replace("--config.", "--set=", 1) if a.startswith("--config.") else a for a in argv]
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as e:
        fail(str(e).replace("\n", " "))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value (see --help)")
    return rest


def fail(message: str) -> None:
    """Prints `error: message` to stderr and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drops what native libraries print to stderr as they load; exceptions pass as usual.

    TensorFlow, which only reads data here, reports each accelerator library that it does not find.
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
    """Keeps libtpu, where it is there for planning alone, from reporting that there is no TPU.

    JAX tries it whenever it looks for devices, and it says at length that it cannot find out what
    it runs on. Told so, it finds no device and is silent. A TPU VM has one of these paths.
    """
    if not any(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` as a program whose user errors are one line on stderr and exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _quiet_libtpu()
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as e:
            fail(str(e))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)
