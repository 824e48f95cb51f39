from tests.serving_kit import chat_export, chat_trunk, identity_export  # noqa: F401 (fixtures)
