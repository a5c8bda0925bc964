"""The page of a promotion: what was decided, when, by whom, on which figures. Markdown, for people."""

from __future__ import annotations

from typing import Any

_VERDICTS = {
    "promoted": "It is the stable version.",
    "shadowed": "It passed the shadow and is in staging; nothing was promoted, the stable version stays.",
    "rejected": "It was refused before it saw any traffic.",
    "withdrawn": "It was taken out; the stable version stays.",
    "held": "No decision: there was not enough to judge by. The stable version stays.",
    "failed": "An error ended it; the stable version stays.",
    "running": "It is under way.",
    "awaiting": "It waits for an approval before it takes any traffic.",
    "soaking": "It is the stable version, and still watched.",
}


def as_markdown(promotion: dict[str, Any], steps: list[dict[str, Any]], policy: dict[str, Any]) -> str:
    """The whole story of a promotion (`registry.promotions.describe` and `.story`)."""
    against = f"against {promotion['from_version']}" if promotion["from_version"] else "the first version"
    lines = [
        f"# {promotion['model']} {promotion['version']}: {promotion['state']}",
        "",
        f"**{promotion['reason'] or 'Under way.'}** {_VERDICTS.get(promotion['state'], '')}",
        "",
        f"{promotion['environment']}, {against}, {promotion['strategy']}; asked for by {promotion['actor']} "
        f"at {_time(promotion['created_at'])}, ended {_time(promotion['finished_at'])}. "
        f"Promotion `{promotion['id']}`, flow run `{promotion['flow_run_id'] or '-'}`.",
        "",
        "## Decisions",
        "",
        *(f"- {_time(s['at'])} **{s['title']}**: {_line(s['detail'])}" for s in steps),
        "",
        *_checks(steps),
        *_evidence(steps),
        "## Policy",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name.replace('_', ' ')} | {_value(value)} |" for name, value in policy.items()),
        "",
        f"The audit trail has it all: `modelkeep audit list --subject promotion:{promotion['id']}`. "
        f"To undo it: `modelkeep rollback {promotion['model']}`.",
    ]
    return "\n".join(lines) + "\n"


def _checks(steps: list[dict[str, Any]]) -> list[str]:
    report = next((s["figures"] for s in steps if s["step"] == "validate" and s["figures"].get("checks")), None)
    if report is None:
        return []
    verdicts = {
        (True, "error"): "passed",
        (True, "warning"): "passed",
        (False, "error"): "**refused**",
        (False, "warning"): "to note",
    }
    rows = [
        f"- {verdicts[check['passed'], check['severity']]}: {check['name']}: {_line(check['text'])}"
        for check in report["checks"]
    ]
    return ["## Validation", "", *rows, ""]


def _evidence(steps: list[dict[str, Any]]) -> list[str]:
    rows = [
        f"| {_line(step['title'])} | {item['stream']} | {_share(item['candidate'])} | {_share(item['stable'])} "
        f"| {item['e_value']:.3g} of {item['threshold']:g} |"
        for step in steps
        for item in step["figures"].get("evidence", [])
    ]
    if not rows:
        return []
    return [
        "## Evidence",
        "",
        "The e-value says how much the counts speak for the candidate being worse than the margin allows; at the threshold it is withdrawn.",
        "",
        "| decision | stream | candidate | stable | e-value |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _share(counts: dict[str, Any]) -> str:
    requests, bad = counts["requests"], counts["bad"]
    return f"{bad} of {requests} ({bad / requests:.2%})" if requests else "none"


def _time(text: str | None) -> str:
    return f"{text[:10]} {text[11:19]}" if text else "-"


def _value(value: Any) -> str:
    return ", ".join(f"{item:.0%}" for item in value) if isinstance(value, list) else str(value)


def _line(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
