"""Waiting policies, which decide which parts of a call are asked for, and when the call ends.

A policy has a method ``decide(history, table)``, which a driver calls again and again. It writes
parts to ask for, parts that are unwanted, and the reason of the end into the table, and returns
when to decide again if nothing happens. Verification is a policy beside another one, which decides
first, and holds the end until it is done::

    while True:
        until = min(policy.decide(history, table) for policy in policies)
        if table.end:
            break
        ...                          # ask workers for the new parts, and drop the unwanted ones
        table.hear(events, until)    # new events; none if the time `until` has come

Only a call that has ended changes the history of latencies.
"""
