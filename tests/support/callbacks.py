"""A callback of scikit-learn that does nothing, for tests that override a part."""


class Silent:
    """The protocol of callbacks of a fit."""

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, **_):
        pass
