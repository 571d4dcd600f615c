"""The gRPC side: transports, servicers, validation, conversion and the error map."""
