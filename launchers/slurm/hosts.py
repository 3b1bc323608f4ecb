"""Lists of hosts, as Slurm writes them."""

import re


def expand_hosts(nodes: str) -> list[str]:
    """Return the hosts of a Slurm list, such as node[03-05,9],login1.

    Raises:
        ValueError: a range of numbers is malformed.
    """
    found = []
    for part in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodes):
        head, bracket, rest = part.partition("[")
        if not bracket:
            found.append(part)
            continue
        inside, _, tail = rest.partition("]")
        for item in inside.split(","):
            first, _, last = item.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            found += [name for n in numbers for name in expand_hosts(f"{head}{n:0{len(first)}}{tail}")]
    return found
