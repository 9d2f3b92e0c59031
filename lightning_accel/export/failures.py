"""Failures of single engines: the others ship, and a failed one is marked with its reason (law 15)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from lightning_accel.errors import MissingPackageError, VerificationError
from lightning_accel.reports.model import FailedEngine, Report

BUILD, LOAD, VERIFY, ARITHMETIC = "build", "load", "verify", "arithmetic"


@dataclass
class EngineFailures:
    """Collects the engines that failed.

    Args:
        strict: whether the first failure is raised instead.
        failed: the engines that failed, in the order of their failures.
        errors: the errors they raised.
    """

    strict: bool = False
    failed: list[FailedEngine] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def __contains__(self, engine: str) -> bool:
        return any(failure.engine == engine for failure in self.failed)

    @contextmanager
    def collect(self, engine: str, step: str) -> Iterator[None]:
        """Mark the engine as failed if the block raises, unless a package is missing.

        Args:
            engine: name of the engine.
            step: what is tried: ``"build"``, ``"load"``, ``"verify"`` or ``"arithmetic"``.
        """
        try:
            yield
        except MissingPackageError:  # installing it is the fix; the network has nothing to do with it
            raise
        except Exception as error:  # engines and their builders raise a dozen unrelated types
            self.add(engine, step, error)

    def add(self, engine: str, step: str, error: Exception) -> None:
        """Mark the engine as failed.

        Raises:
            Exception: the error itself, if failures are strict.
        """
        if self.strict:
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        self.failed.append(FailedEngine(engine, step, reason))
        self.errors.append(error)

    def require_others(self, engines: Sequence[str]) -> None:
        """Raise unless one of the engines is left.

        Raises:
            Exception: the error of the engine, if there was one engine only.
            VerificationError: all of several engines failed.
        """
        if not self.errors or any(engine not in self for engine in engines):
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        reasons = " ".join(f"{failure.engine}: {failure.reason}" for failure in self.failed)
        raise VerificationError(
            f"Argument `engines` must name an engine that computes this network on this machine, but got {list(engines)}, which all "
            f"fail. {reasons}"
        )

    def replaced(self, engines: Sequence[str], default: str) -> list[FailedEngine]:
        """The failures, with the new default in those that took the place of the first engine.

        Args:
            engines: engines that were asked for, the preferred default first.
            default: engine that is the bundle's default.
        """
        before = engines[: engines.index(default)] if default in engines else engines
        return [replace(f, replaced_by=default) if f.engine in before else f for f in self.failed]


def failed_line(report: Report) -> str:
    """The failed engines with their reasons in one line, for the end of a run; empty if none failed."""
    if not report.failed:
        return ""
    reasons = " ".join(f"{f.engine} ({f.step}): {sentence(f.reason)}" for f in report.failed)
    shipped = ", ".join(dict.fromkeys(str(line["engine"]) for line in report.engines))
    new = next((f" The default is {f.replaced_by} instead of {f.engine}." for f in report.failed if f.replaced_by), "")
    return f"FAILED, and not in the bundle: {reasons} The bundle ships {shipped}.{new}"


def sentence(text: str) -> str:
    """The text with a full stop."""
    return text if text.endswith((".", "!", "?")) else f"{text}."
