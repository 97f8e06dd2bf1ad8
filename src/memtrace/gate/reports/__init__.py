"""The forms of a check's report, one file a form: text, GitHub's workflow commands, markdown, JUnit's XML.

In comes a report of findings. Out goes text. Must not know where it is printed or written. A new form is a file with
one function, and its row in `memtrace.cli.check`.
"""
