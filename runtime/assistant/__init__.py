"""The document assistant: reads, summarises and questions a document on the device."""
