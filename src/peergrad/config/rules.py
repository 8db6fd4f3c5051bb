"""The checks that sections of the configuration share, and the one form of their errors."""


def require(ok: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """Raise the project's one form of configuration error unless ``ok``."""
    if not ok:
        raise ValueError(f"{key} = {value!r}: {rule}; {remedy}")


def at_least(key: str, value: float, least: float, remedy: str = "raise it") -> None:
    require(value >= least, key, value, f"must be at least {least}", remedy)


def positive(key: str, value: float, remedy: str) -> None:
    require(0 < value < float("inf"), key, value, "must be positive and finite", remedy)


def optional_positive(
    key: str, value: float | None, remedy: str = "use null to turn it off"
) -> None:
    if value is not None:
        positive(key, value, remedy)
