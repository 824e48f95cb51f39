"""The local proxy: OpenAI's API in front, obfuscated embeddings behind."""
