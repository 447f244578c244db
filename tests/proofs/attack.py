"""Attack our programs with hostile files, folders, flags, signals and machines; each must end by itself, in a sentence.

    python -m tests.proofs.attack [--only AREA]    # three minutes on two cores

A case prepares a sandbox, a folder that holds a small data set and is the working directory, and runs a program in it.
The program survives the attack if it ends by itself within 10 seconds, leaves no process behind, prints no traceback
and changes nothing in the sandbox outside of its output folder. It must end as the case says: with status 0 or with
another status and one sentence of ours that says what is wrong. Prints each failure with what the program printed, then
a Markdown table, and exits with status 1 if there were failures. The cases are in tests/proofs/attacks.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.proofs.attacks import flags, images, lists, machine, runs, scripts, states
from tests.proofs.attacks.sandbox import Skipped, attack, originals, remove_originals

CASES = sum((each.CASES for each in (states, runs, images, lists, flags, scripts, machine)), [])
AREAS = list(dict.fromkeys(case.area for case in CASES))


def outcome(case):
    """Carry out a case; returns ('survived' | 'failed' | 'skipped', why)."""
    try:
        fault = attack(case)
    except Skipped as reason:
        return "skipped", str(reason)
    except TimeoutError as error:
        return "failed", str(error)
    return ("failed", fault) if fault else ("survived", "")


def run(cases):
    """Carry out cases, two at a time; returns [(case, outcome, why)] in their order."""
    originals()
    try:
        with ThreadPoolExecutor(2) as threads:
            return [(case, *result) for case, result in zip(cases, threads.map(outcome, cases))]
    finally:
        remove_originals()


def table(results):
    """The Markdown table of a run: a row for each area, and the total. Attacks that were skipped are not counted."""
    rows = ["| area | tried | survived |", "|---|--:|--:|"]
    for area in [*dict.fromkeys(case.area for case, *_ in results), ""]:
        ends = [end for case, end, _ in results if case.area == (area or case.area) and end != "skipped"]
        rows.append(f"| {area or '**all**'} | {len(ends)} | {ends.count('survived')} |")
    return "\n".join(rows)


def main(argv=None):
    """Run the cases, print failures and table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=AREAS, metavar="AREA", help=f"one of: {', '.join(AREAS)}")
    args = parser.parse_args(argv)
    results = run([case for case in CASES if args.only in (None, case.area)])
    for case, end, why in results:
        if end != "survived":
            print(f"{case.area}, {case.name}: {end}: {why}\n")
    print(table(results))
    return int(any(end == "failed" for _, end, _ in results))


if __name__ == "__main__":
    sys.exit(main())
