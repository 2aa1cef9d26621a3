"""Healing: a pruned or quantized model learns to answer like the one it was made from.

Knowledge distillation as Minitron does it (https://arxiv.org/abs/2407.14679): the forward KL
divergence between the logits of teacher and student at temperature 1, and, where much depth is
gone, the distance of their last hidden states, weighted so that both terms count alike. All
weights learn, or low-rank updates alone (LoRA, https://arxiv.org/abs/2106.09685; SPP's where the
student is sparse), which are merged at the end; a sparse student keeps its zeros. A run stopped at
any moment goes on from its last checkpoint and ends in the same weights as one that was never
stopped. Several processes that ``torchrun`` started draw the same sequences as one, share them, and
end in the same weights up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketslm.errors import UsageError
from pocketslm.export.prune import adaptive, sparse, width
from pocketslm.export.prune.pruned import Changed
from pocketslm.export.team import Team, alone
from pocketslm.export.text import read_text
from pocketslm.folders import written
from pocketslm.models.checkpoint import Checkpoint, checkpoint_sha256, one_line
from pocketslm.models.hf_writer import save_hf
from pocketslm.models.reference import load_reference
from pocketslm.models.sites import matrices
from pocketslm.runtime.tokenizer import load_tokenizer_files

Ids = npt.NDArray[np.int64]
STATE = "healing.pt"
CALIBRATION = 8  # sequences that show a stage of pruning what matters


@dataclass(frozen=True)
class HealConfig:
    """How to heal; the defaults suit a model of 100M parameters on a few CPU cores.

    A step takes ``batch`` sequences of ``sequence`` tokens. The learning rate rises linearly over
    the first ``warmup`` share of the steps and falls to a tenth along a cosine. ``lora_rank``: None
    trains every weight. ``hidden``: also match the last hidden state. ``bf16``: multiply matrices
    in bfloat16 (weights and loss stay fp32). ``adaptive``: prune this share of the layers on the
    way, in ``stages`` of equal shares and steps under one learning rate (Adapt-Pruner interleaved).
    """

    steps: int = 200
    batch: int = 4
    sequence: int = 256
    learning_rate: float = 2e-4
    warmup: float = 0.05
    lora_rank: int | None = None
    hidden: bool = False
    bf16: bool = False
    adaptive: float | None = None
    stages: int = 4
    seed: int = 0
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "sequence", "checkpoint_every", "lora_rank", "stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"learning_rate is {self.learning_rate}, expected between 0 and 1")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup}, expected a share of the steps below 1")
        if self.adaptive is not None:
            adaptive.check_share(self.adaptive)
            if self.lora_rank is not None:
                raise UsageError("adaptive trains every weight; leave lora_rank or adaptive out")


def heal(
    student: Checkpoint,
    teacher: Checkpoint,
    ids: Ids,
    work: Path,
    config: HealConfig,
    progress: Callable[[int, int, float], None] = lambda step, steps, kl: None,
    team: Team | None = None,
) -> tuple[Any, list[float]]:
    """Train ``student`` on the teacher's answers to ``ids`` [tokens]; model and KL of every step.

    ``work``: a folder for the checkpoint that an interrupted run goes on from; it is the caller's
    to remove. ``progress`` gets the steps done, all of them, and the last KL in nats a token. Runs
    on a GPU where torch finds one. ``team``: the processes that share the sequences of each step;
    all see ``work``, one writes there and tells the progress. Raises UsageError where the two
    models' vocabularies differ, the batch cannot be shared evenly, the text is shorter than a
    sequence, or ``work`` belongs to another run.
    """
    team = team or alone()
    if config.batch % team.size:
        raise UsageError(
            f"a step of {config.batch} sequences does not divide among {team.size} processes; "
            f"give --batch a multiple of {team.size}"
        )
    for model in (student, teacher):
        model.config.need_head("heal")
        model.config.need_own_layers("heal")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(
            f"the student has a vocabulary of {student.config.vocab_size}, the teacher "
            f"{teacher.config.vocab_size}: was one made from the other?"
        )
    if len(ids) <= config.sequence:
        raise UsageError(f"the text has {len(ids)} tokens, expected more than {config.sequence}")
    torch.manual_seed(config.seed)
    run = _Run(student, teacher, config, team)
    state = work / STATE
    identity = _identity(student, teacher, ids, config)
    if state.exists():
        run.restore(state, identity)
    if team.the_leaders(run.step) != run.step:
        raise UsageError(
            f"a process of this run does not see the checkpoint in {work}; expected a folder that "
            "all nodes share"
        )
    while run.step < config.steps:
        if config.adaptive is not None and (stage := _stage_at(config, run.step)):
            examples = _batch(ids, replace(config, batch=CALIBRATION), run.step)
            run.prune(examples.to(team.device), config.adaptive * stage / config.stages)
        kl = run.advance(team.share(_batch(ids, config, run.step)).to(team.device))
        if team.leads and (run.step % config.checkpoint_every == 0 or run.step == config.steps):
            run.save(state, identity)
        if team.leads:
            progress(run.step, config.steps, kl)
    return run.merged(), run.losses


def heal_folder(
    student: Checkpoint,
    teacher: Checkpoint,
    text: Path,
    out: Path,
    config: HealConfig,
    *,
    held_out: int = 0,
    progress: Callable[[int, int, float], None] = lambda step, steps, kl: None,
    team: Team | None = None,
) -> list[float]:
    """:func:`heal` on a text without its first ``held_out`` tokens, into a Hugging Face folder.

    The checkpoint of an interrupted run lies beside ``out``, under a hidden name; the same call
    goes on from there. Returns the KL of every step. Raises UsageError where ``out`` is in the way
    or the text cannot be read, and what :func:`heal` raises.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; choose another")
    content = read_text(text)
    files = student.tokenizer_files()
    ids = np.asarray(load_tokenizer_files(files).encode(content)[held_out:], np.int64)
    work = out.with_name(f".{out.name}.healing")
    model, losses = heal(student, teacher, ids, work, config, progress, team)
    if team is None or team.leads:
        save_hf(student, work / "model", model)
        (work / "model").rename(out)
        shutil.rmtree(work)
    return losses


class _Run:
    """Student, teacher, optimizer and how far they have come."""

    def __init__(
        self, student: Checkpoint, teacher: Checkpoint, config: HealConfig, team: Team
    ) -> None:
        self.config, self.team, self.checkpoint = config, team, student
        device = team.device
        self.kept = adaptive.everything(student.config)
        self.step = 0
        self.losses: list[float] = []
        self.student = load_reference(student, config.sequence).to(device)
        self.teacher = load_reference(teacher, config.sequence).to(device)
        if config.lora_rank is None:
            self.student.requires_grad_(True)
            if student.sparse:
                keep_zeros(self.student)
        else:
            add_lora(self.student, config.lora_rank, sparse.Spp if student.sparse else LowRank)
        projection: nn.Linear | None = None
        if config.hidden:
            sizes = student.config.hidden_size, teacher.config.hidden_size
            projection = nn.Linear(*sizes, bias=False, device=device)
            nn.init.eye_(projection.weight)
        distances = _Distances(self.student, projection)
        self.trained = [p for p in distances.parameters() if p.requires_grad]
        self.distances = team.together(distances)
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0.0, betas=(0.9, 0.95))

    def prune(self, ids: Tensor, share: float) -> None:
        """Silence parts until ``share`` of the whole student is gone."""
        leads = self.team.leads  # others might round to another choice
        kept = adaptive.prune(self.student, self.kept, ids, share) if leads else None
        self.kept = self.team.the_leaders(kept)
        adaptive.silence(self.student, self.kept)

    def advance(self, ids: Tensor) -> float:
        """One step on this process's ids [batch, sequence]; the whole batch's KL before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        with torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.config.bf16):
            with torch.no_grad():
                target, target_hidden = _forward(self.teacher, ids)
            own = self.distances(ids, target, target_hidden)
        kl, *distance = self.team.mean(own)
        loss = own[0]
        if distance:
            loss = loss + (kl / distance[0].clamp_min(1e-12)) * own[1]
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.adaptive is not None:
            adaptive.silence(self.student, self.kept)  # momentum would wake them up
        self.step += 1
        self.losses.append(kl.item())
        return self.losses[-1]

    def save(self, path: Path, identity: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        trained = [p.detach().cpu() for p in self.trained]
        optimizer = self.optimizer.state_dict()
        with written(path) as part:
            torch.save(
                {
                    "identity": identity,
                    "step": self.step,
                    "losses": self.losses,
                    "kept": (self.kept.groups, self.kept.neurons),
                    "trained": trained,
                    "optimizer": optimizer,
                },
                part,
            )

    def restore(self, path: Path, identity: str) -> None:
        """Take up what :meth:`save` wrote; UsageError where it is of another run, or damaged."""
        try:
            state = torch.load(path, map_location=self.team.device, weights_only=True)
            same = state["identity"] == identity
            if same:
                self._take(state)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a pickle, an archive and tensors: each has errors of its own
            raise UsageError(
                f"{path} is damaged ({type(error).__name__}: {one_line(error):.200}); remove "
                f"{path.parent} to begin anew"
            ) from None
        if not same:
            raise UsageError(
                f"{path.parent} holds a run with another model, text or setting; remove it to "
                "begin anew"
            )

    def _take(self, state: dict[str, Any]) -> None:
        step, losses = state["step"], [float(loss) for loss in state["losses"]]
        if not (isinstance(step, int) and 0 <= step <= self.config.steps and len(losses) == step):
            raise ValueError(f"step {step!r} with {len(losses)} losses")
        self.step, self.losses = step, losses
        groups, neurons = ([part.cpu() for part in parts] for parts in state["kept"])
        self.kept = replace(self.kept, groups=groups, neurons=neurons)
        with torch.no_grad():
            for parameter, value in zip(self.trained, state["trained"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def merged(self) -> Any:
        """The student in eval mode, low-rank updates added, without what was pruned."""
        for module in self.student.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        model = self.student.eval().requires_grad_(False).cpu()
        if self.config.adaptive is None:
            return model
        narrow = width.Narrowed(Changed(self.checkpoint, model, "trained"), self.kept)
        return load_reference(narrow, self.config.sequence)


class _Distances(nn.Module):
    """How far a student is from what its teacher says: KL and, with a projection, hidden states."""

    def __init__(self, student: Any, projection: nn.Linear | None) -> None:
        super().__init__()
        self.student, self.projection = student, projection

    def forward(self, ids: Tensor, target: Tensor, target_hidden: Tensor) -> list[Tensor]:
        logits, hidden = _forward(self.student, ids)
        with torch.autocast(ids.device.type, enabled=False):
            found = [forward_kl(target, logits)]
            if self.projection is not None:
                found.append(F.mse_loss(self.projection(hidden.float()), target_hidden.float()))
        return found


class LowRank(nn.Module):
    """``W + B A`` with A [rank, in] and B [out, rank], B zero: at first nothing changes."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, width = weight.shape
        self.a = nn.Parameter(torch.randn(rank, width, device=weight.device) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_lora(model: Any, rank: int, update: Callable[[Tensor, int], nn.Module] = LowRank) -> None:
    """Make every matrix of the blocks learn through a low-rank update; all else is frozen."""
    model.requires_grad_(False)
    for module in _projections(model):
        parametrize.register_parametrization(module, "weight", update(module.weight, rank))


def keep_zeros(model: Any) -> None:
    """Zeros of the blocks' matrices get no gradient, so that they stay zeros."""
    for module in _projections(model):
        module.weight.register_hook(partial(torch.mul, module.weight.detach() != 0))


def _projections(model: Any) -> list[Any]:
    """The modules of the layers' matrices."""
    return [
        layer.get_submodule(name)
        for layer, described in zip(model.model.layers, model.config.stored_layers, strict=True)
        for name in matrices(described)
    ]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats a token of logits [B, S, V]."""
    p = torch.log_softmax(teacher.float(), -1).flatten(0, 1)
    q = torch.log_softmax(student.float(), -1).flatten(0, 1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def learning_rate(config: HealConfig, step: int) -> float:
    """Of a step counted from 0: linear warm-up, then a cosine down to a tenth."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def _forward(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V] and the normalized last hidden state [B, S, H]."""
    kept: list[Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        logits, _ = model(ids, model.empty_cache(len(ids)))
    finally:
        hook.remove()
    return logits, kept[0]


def _stage_at(config: HealConfig, step: int) -> int | None:
    """Which stage of pruning, from 1, begins before this step."""
    begun, before = (s * config.stages // config.steps for s in (step, step - 1))
    return begun + 1 if begun > before else None


def _batch(ids: Ids, config: HealConfig, step: int) -> Tensor:
    """The sequences [batch, sequence] of a step: a function of seed and step, nothing else."""
    starts = np.random.default_rng((config.seed, step)).integers(
        0, len(ids) - config.sequence, config.batch
    )
    return torch.from_numpy(np.stack([ids[start : start + config.sequence] for start in starts]))


def _identity(student: Checkpoint, teacher: Checkpoint, ids: Ids, config: HealConfig) -> str:
    facts = {
        "student": checkpoint_sha256(student),
        "teacher": checkpoint_sha256(teacher),
        "text": hashlib.sha256(ids.tobytes()).hexdigest(),
        "config": asdict(config),
    }
    return json.dumps(facts, sort_keys=True)
