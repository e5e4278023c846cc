"""How much is trained and painted, the same for every method."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """Equal for all methods of a run but for what is told. As it stands for the demo base."""

    steps: int = 300
    batch: int = 1  # the paper's
    prompts: int = 10  # the paper's
    pictures: int = 1  # of each prompt, from noise of their own; the paper paints 5
    plain_steps: int = 0  # of a LoRA of one rank; 0: as many as all others

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "prompts", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed.")
        if self.plain_steps < 0:
            raise ValueError(f"plain_steps is {self.plain_steps}; 0 or more are needed.")


DEMO = Plan()
QUICK = Plan(steps=150, prompts=6)
SWEEP = Plan(pictures=2)
SDXL = Plan(steps=500, pictures=5, plain_steps=1000)  # the paper's
KOALA = Plan(steps=800, pictures=5, plain_steps=1000)  # the paper's
DRY = Plan(steps=12, prompts=1)  # fewer give AdaLoRA no time to choose
TUNING_PICTURES = 3  # of each prompt: one subject has to tell rates apart


def changed(plan: Plan, text: str) -> Plan:
    """``plan`` with what ``steps=20,prompts=2`` says. Raises ValueError for what it cannot say."""
    try:
        given = dict(part.split("=") for part in text.split(",") if part)
        return replace(plan, **{name.strip(): int(value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--plan is {text!r}; write it as steps=300,batch=1,prompts=10,pictures=1, or some of "
            "them, with whole numbers from 1."
        ) from error
