"""Prints "PASSED FAILED" from a JUnit report. A test that was skipped proved nothing and counts as failed."""

import sys
from xml.etree import ElementTree

suite = ElementTree.parse(sys.argv[1]).getroot().find("testsuite")
assert suite is not None, "a report has one suite"
total, failures, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
failed = min(total, failures + errors + skipped)
print(total - failed, failed)
