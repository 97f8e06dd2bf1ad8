"""One case planned with many versions: releases of a package, or commits of a repository.

In come a case and two versions. Out go the outcome of each version that was tried, and the one that changed the peak.
Must not know how a case is planned. A new kind of version is a file that lists them in their order and puts one on
Python's path.
"""
