"""What the fork server of these tests imports: what that of the others does, with the stand-in."""

from tests.te.install import install

install()

from tests import preload  # noqa: E402, F401
