from tests.serving_kit import chat_export, chat_trunk, identity_export, sgt, trunk  # noqa: F401 (fixtures)
