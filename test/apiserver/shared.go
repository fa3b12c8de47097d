package apiserver

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/vmckpt/vmckpt/test/machine"
)

// Shared is the one server of a test binary, started by the first test that asks for it. Its zero value is ready:
//
//	var shared apiserver.Shared
//
//	func TestMain(m *testing.M) { os.Exit(shared.Main(m)) }
//
//	func TestSomething(t *testing.T) {
//		server := shared.Server(t)
//		namespace := server.Namespace(t)
//		...
type Shared struct {
	once   sync.Once
	server *Server
	err    error
}

// Main runs the tests, then stops the server. It returns the exit code.
func (s *Shared) Main(m *testing.M) int {
	code := m.Run()
	if s.server != nil {
		if err := s.server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop the API server:", err)
			return max(code, 1)
		}
	}
	return code
}

// Server returns the server. Where it cannot run, the test is skipped.
func (s *Shared) Server(t testing.TB) *Server {
	t.Helper()
	s.once.Do(func() {
		var dir string
		if dir, s.err = os.MkdirTemp("", "vmckpt-apiserver-"); s.err == nil {
			s.server, s.err = Start(dir)
		}
		if s.err != nil && dir != "" {
			s.err = errors.Join(s.err, os.RemoveAll(dir))
		}
	})
	if missing := (*machine.Unavailable)(nil); errors.As(s.err, &missing) {
		t.Skip(missing)
	} else if s.err != nil {
		t.Fatal(s.err)
	}
	return s.server
}
