"""The campaign: many visitors, hostile input and sudden ends, run for its figures and not in CI.

    python -m tests.campaign clients --model smollm2-135m --minutes 10
    python -m tests.campaign hostile
    python -m tests.campaign faults --moments 20

Each prints a table, and ends with status 1 where something is not as it should be.
"""
