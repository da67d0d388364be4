"""The numbers of an update: a line of metrics.jsonl. docs/metrics.md says what each means.

Each rank counts what it has seen (`counts_of`). The counts of all ranks are added, and `metrics_of`
makes shares and means of the sums.
"""

from collections import Counter

from reward import is_negative


def counts_of_group(outcomes: list, kept: list[bool]) -> dict:
    """What a group adds to the counts.

    Args:
        outcomes: the Reward of each of its trajectories that was scored.
        kept: whether negative control kept it.
    """
    below = [is_negative(outcome, outcomes) for outcome in outcomes]
    right = sum(outcome.correct for outcome in outcomes)
    return {
        "right": right,
        "negatives": sum(below),
        "kept": sum(keep for keep, is_below in zip(kept, below) if is_below),
        "zero_variance": bool(outcomes) and not any(below),
        "all_right": 0 < len(outcomes) == right,
        "all_wrong": right == 0 < len(outcomes),
    }


def counts_of(
    groups: list, outcomes: list[list], kept: list[list[bool]], in_loss: int, rollouts
) -> dict:
    """Counts of one rank, which may be added to those of other ranks.

    Args:
        groups: `Group` objects that the update trains on.
        outcomes: the Reward of each trajectory of each group that was scored.
        kept: whether negative control kept it.
        in_loss: tokens in the loss.
        rollouts: what gave the groups.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    rewards = [outcome for group in outcomes for outcome in group]
    of_groups = Counter(right=0, negatives=0, kept=0, zero_variance=0, all_right=0, all_wrong=0)
    families, right, tries, hits = (Counter() for _ in range(4))
    for group, outcomes_of, kept_of in zip(groups, outcomes, kept):
        task, counts = group.trajectories[0].task, counts_of_group(outcomes_of, kept_of)
        of_groups.update(counts)
        families[task.family] += len(group.trajectories)
        right[task.family] += counts["right"]
        tries[task.id] += len(outcomes_of)
        hits[task.id] += counts["right"]
    parts, versions = Counter(), Counter()
    for outcome in rewards:
        parts.update(outcome.parts)
    for turn in turns:
        versions[turn.version] += len(turn.action_ids)
    return {
        "trajectories": len(trajectories),
        "reward": sum(outcome.total for outcome in rewards),
        "outcomes": len(rewards),
        "turns": len(turns),
        "tokens": sum(versions.values()),
        "surprise": -sum(p for turn in turns for p in turn.logprobs),
        "groups": len(groups),
        **of_groups,
        "tries": dict(tries),
        "hits": dict(hits),
        "in_loss": in_loss,
        "families": dict(families),
        "right_of_family": dict(right),
        "parts": dict(parts),
        "versions": dict(versions),
        "status": dict(Counter(t.status for t in trajectories)),
        "parked": rollouts.parked(),
        "restarts": rollouts.restarts,
        "idle_share": rollouts.idle_share,
        "ranks": 1,
        "errors": dict(Counter(t.error for t in trajectories if t.status == "format_error")),
    }


def metrics_of(total: dict, version: int) -> dict:
    """Means and shares of the counts of all ranks.

    Args:
        total: sums of what `counts_of` gives.
        version: of the weights before this update; tokens that older ones sampled are stale.
    """
    tokens, outcomes = max(1, total["tokens"]), max(1, total["outcomes"])
    ages = {version - sampled_by: count for sampled_by, count in total["versions"].items()}
    families = sorted(total["families"])
    return {
        "reward": total["reward"] / outcomes,
        "reward_parts": {name: value / outcomes for name, value in total["parts"].items()},
        "pass_rate": total["right"] / max(1, total["trajectories"]),
        "pass_rate_by_family": {
            family: total["right_of_family"][family] / max(1, total["families"][family])
            for family in families
        },
        "turns": total["turns"] / max(1, total["trajectories"]),
        "tokens": total["tokens"] / max(1, total["trajectories"]),
        # The mean surprise of sampled tokens is an unbiased estimate of the policy's entropy.
        "entropy": total["surprise"] / tokens,
        "zero_variance_groups": total["zero_variance"] / max(1, total["groups"]),
        "all_right_groups": total["all_right"] / max(1, total["groups"]),
        "all_wrong_groups": total["all_wrong"] / max(1, total["groups"]),
        "kept_negatives": total["kept"] / total["negatives"] if total["negatives"] else 1.0,
        "stale_share": 1 - ages.get(0, 0) / tokens,
        "staleness": {str(age): count / tokens for age, count in sorted(ages.items())},
        "trained_share": total["in_loss"] / tokens,
        "parked": total["parked"],
        "restarts": total["restarts"],
        "idle_share": total["idle_share"] / total["ranks"],
        "status": total["status"],
        "format_errors": total["errors"],
    }
