"""The trials of a search: an Optuna study, which several workers may share.

Each worker takes one trial after the other and tells the database every :data:`HEARTBEAT_S` seconds
that it is alive. Once a worker has been silent for :data:`GRACE_S`, its trial goes to the next one
that asks.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, NoReturn

from pocketslm.errors import DeviceError, UsageError

HEARTBEAT_S, GRACE_S = 15, 45
POLL_S = 1.0  # between two looks at what other workers do
RECIPE, METRICS = "recipe", "metrics"  # of a trial: what it tries, and what was measured
_ATTEMPTS = 5  # workers that begin at once may be in each other's way when tables are made

First = tuple[Mapping[str, Any], str]  # parameters and their recipe


def open_study(
    url: str, name: str, directions: Sequence[Any], first: Sequence[First], seed: int | None
) -> Any:
    """The study ``name`` in a database. Whoever makes it puts ``first`` into its queue.

    - ``url``: SQLAlchemy's, such as ``sqlite:///trials.db`` or ``postgresql://user@host/database``.
    - ``seed``: makes the proposals of a single worker repeatable. Workers that share a study need
      None, or they all propose the same.

    Raises UsageError where the database cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(url)
    options: dict[str, Any] = {"storage": storage, "study_name": name}
    options["sampler"] = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=8, constant_liar=seed is None
    )
    try:
        study = optuna.create_study(directions=list(directions), **options)
    except optuna.exceptions.DuplicatedStudyError:
        return optuna.load_study(**options)
    for parameters, recipe in first:
        study.enqueue_trial(dict(parameters), user_attrs={RECIPE: recipe})
    return study


@contextmanager
def database_errors() -> Iterator[None]:
    """UsageError where the trials' database is damaged, full or gone: what is in it may be of any
    form."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    unreadable = (SQLAlchemyError, optuna.exceptions.StorageInternalError, Unreadable)
    try:
        yield
    except unreadable as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), "")
        raise UsageError(
            f"the database of the trials cannot be used: {reason}; where it is damaged, remove it: "
            "the search then begins anew"
        ) from None


class Unreadable(Exception):
    """A trial that no search has written."""


def _storage(url: str) -> Any:
    import optuna
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    # SQLAlchemy's own choice for the plain name is a driver that is no longer developed.
    driven = url.replace("postgresql://", "postgresql+psycopg://", 1)
    for attempt in range(_ATTEMPTS):
        try:
            with _experimental():
                return optuna.storages.RDBStorage(
                    driven,
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=_again,
                )
        except (SQLAlchemyError, ValueError) as error:
            if attempt + 1 < _ATTEMPTS and not isinstance(error, ArgumentError):
                time.sleep(POLL_S * random.uniform(0.1, 0.5))
                continue
            reason = next(iter(str(error.__cause__ or error).splitlines()), "")
            raise UsageError(f"storage {url!r} cannot be used: {reason}") from None
    raise AssertionError("the last attempt returns or raises")


def _again(study: Any, trial: Any) -> None:
    """Put a trial back into the queue, with what was measured of it."""
    known = {name: trial.user_attrs[name] for name in (RECIPE, METRICS) if name in trial.user_attrs}
    study.enqueue_trial(trial.params, user_attrs=known)


def finished(study: Any) -> list[Any]:
    """The trials that were measured, or given up because they broke a limit."""
    return [trial for trial in study.get_trials(deepcopy=False) if _is_finished(trial)]


def work(study: Any, most: int, attempt: Callable[[Any], Sequence[float]]) -> None:
    """Take trials until ``most`` are finished, by this worker and by others.

    ``attempt``: tries one; it calls :func:`claim` first. It returns the values of a whole trial and
    calls :func:`give_up` for another. If it is interrupted or loses its device, the trial goes
    back into the queue.
    """
    import optuna

    def guarded(trial: Any) -> Sequence[float]:
        try:
            return attempt(trial)
        except (DeviceError, KeyboardInterrupt):
            _again(study, trial)
            raise

    while (done := len(finished(study))) < most:
        running = [one for one in study.get_trials(deepcopy=False) if _is_running(one)]
        if done + len(running) >= most:  # others make what is left, unless they die
            time.sleep(POLL_S)
            with _experimental():
                optuna.storages.fail_stale_trials(study)
            continue
        # A worker that was silent for too long finds that its trial was given to another.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            study.optimize(guarded, n_trials=1)


def claim(study: Any, trial: Any, recipe: str, most: int) -> None:
    """Say what a trial tries. Raises optuna.TrialPruned where others already make ``most`` trials,
    or this recipe: of two workers the one with the earlier trial goes on.
    """
    import optuna

    trial.set_user_attr(RECIPE, recipe)
    waiting = optuna.trial.TrialState.WAITING
    before = [
        one
        for one in study.get_trials(deepcopy=False)
        if one.number < trial.number
        and (_is_finished(one) or _is_running(one) or one.state == waiting)
    ]
    same = [one for one in before if one.user_attrs.get(RECIPE) == recipe]
    if len(before) >= most or not all(_is_finished(one) for one in same):
        raise optuna.TrialPruned


def give_up() -> NoReturn:
    """End a trial that broke a limit before all was measured."""
    import optuna

    raise optuna.TrialPruned


def _is_finished(trial: Any) -> bool:
    return trial.state.is_finished() and trial.state.name != "FAIL" and METRICS in trial.user_attrs


def _is_running(trial: Any) -> bool:
    """Whether a worker makes it. Without a recipe it has just begun, or died as it began."""
    if trial.state.name != "RUNNING":
        return False
    fresh = datetime.now() - trial.datetime_start < timedelta(seconds=GRACE_S)
    return fresh or RECIPE in trial.user_attrs


@contextmanager
def _experimental() -> Iterator[None]:
    """Heartbeats are new in Optuna, which warns of it."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
