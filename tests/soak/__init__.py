"""The bank: transfers under faults, and a comparison of what clients were told with the books.

``python -m tests.soak`` runs it. :mod:`tests.soak.bank` is the application that the servers run,
:mod:`tests.soak.clients` sends the transfers, :mod:`tests.soak.nemesis` makes the faults,
:mod:`tests.soak.checks` compares, and :mod:`tests.soak.controls` has programs that must be caught.
"""
