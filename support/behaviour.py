"""What an agent did in a trajectory, as numbers. report.py draws their means and compares them.

In: a line of trajectories.jsonl. Out: name -> number. To count another behaviour, add a line.
"""


def behaviour_of(record: dict) -> dict[str, float]:
    """What the agent did in one trajectory, as numbers that have a mean. A name that a trajectory
    does not have counts as 0. Names that begin with "share" are shown in percent.
    """
    turns, status = record["turns"], record["status"]
    calls = [call for turn in turns for call in turn["calls"]]
    results = [result for turn in turns for result in turn["results"]]
    asked = [call["arguments"].get("queries") for call in calls if call["name"] == "search"]
    queries = [str(q).casefold().strip() for each in asked if isinstance(each, list) for q in each]
    thoughts = [turn["text"].partition("<think>")[2].partition("</think>")[0] for turn in turns]
    numbers = {
        "turns": len(turns),
        "sampled tokens": sum(t >= 0 for s in record["segments"] for t in s["turn_of"]),
        "words inside <think>": sum(len(thought.split()) for thought in thoughts),
        "queries": len(queries),
        "repeated queries": len(queries) - len(set(queries)),
        "pages opened": len(record["pages"]),
        "errors of tools": sum(result.startswith("error") for result in results),
        "share correct": record["correct"] or 0.0,
        "share answered": float(status == "answered"),
        "share over a limit": float(status in ("over_context", "over_turns")),
    }
    for call in calls:
        numbers[f"calls of {call['name']}"] = numbers.get(f"calls of {call['name']}", 0) + 1
    if status == "format_error":
        numbers[f"share with format error: {record['error']}"] = 1.0
    return numbers
