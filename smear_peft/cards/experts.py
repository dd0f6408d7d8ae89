"""What a card says of an adapter's experts one by one: names, where they come from, which are frozen."""

from __future__ import annotations

from smear_peft.config import SmearConfig


def experts_table(config: SmearConfig | None) -> str:
    """A section in Markdown; "" where there is no adapter, or its configuration says nothing of single experts."""
    if config is None or not config.tell_experts():
        return ""
    count = config.num_experts
    origins = config.expert_origins or [""] * count
    shares = config.expert_shares or [1.0] * count
    lines = ["| expert | name | from | share | trained here |", "| ---: | --- | --- | ---: | --- |"]
    for n, name in enumerate(config.names_of_experts(count)):
        trained = "no" if n in (config.frozen_experts or ()) else "yes"
        cells = (str(n), name, origins[n], f"{shares[n]:g}", trained)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "## Experts\n\n" + "\n".join(lines)
