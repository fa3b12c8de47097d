// Command gotest runs go test and ends with what a reader of a long log looks for: the failures, and every test that was
// skipped, with its reason.
//
//	gotest [arguments of go test]
//
// In go the arguments, out come go test's own lines as each package ends, with the full output of tests that failed.
//
// What must hold: the exit code is go test's, and a test that was skipped is listed as skipped, never counted as passed.
package main
