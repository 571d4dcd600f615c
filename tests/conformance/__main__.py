"""`make conformance`: connectors against the specifications that their PSPs published.

An independent mock serves each specification, and every kind of request that the connector makes is
sent to it. It keeps no state, so that it says nothing about what comes of them; the conformance
suite of `make test` does. Needs npm, for Stripe's own mock Go too; says plainly what it ran, or
that it did not. Acquirers' hosts have no published specification.
"""

import shutil
import subprocess
import sys

from tests.conformance import adyen, braintree, stripe
from tests.conformance.mocks import DIRECTORY, PACKAGES, SPECIFICATIONS

NOT_RUN = 2
"""The exit status where nothing was checked."""


def main() -> int:
    """The exit status."""
    npm = shutil.which("npm")
    if npm is None:
        print("NOT RUN: npm is not here, so the specifications could not be served.")
        return NOT_RUN
    if not (DIRECTORY / SPECIFICATIONS).exists():
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        print(f"installing {' and '.join(PACKAGES)} into {DIRECTORY}")
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(DIRECTORY), *PACKAGES]
        if subprocess.run(command, check=False).returncode:
            print("NOT RUN: npm could not install the mock.")
            return NOT_RUN
    bad = stripe.report() + (stripe.report_official() or 0) + adyen.report() + braintree.report()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
