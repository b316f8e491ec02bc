"""The error for an option that does not fit the model, the devices or another option."""


class PlanError(ValueError):
    """A plan that cannot be carried out.

    Args:
        option: the wrong option, as the stages name it but without the dashes; None where the model itself is wrong.
        message: what is wrong with its value, and which values work.
    """

    def __init__(self, option: str | None, message: str):
        super().__init__(f"{option} {message}" if option else message)
        self.option = option
