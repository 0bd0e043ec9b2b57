"""Files in object stores (s3://, gs://, az://, https://): their addresses, requests, a local cache, uploads."""
