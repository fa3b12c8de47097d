package main

import (
	"context"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/vmckpt/vmckpt/node-agent/guard"
	"github.com/vmckpt/vmckpt/node-agent/inject"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
	"github.com/vmckpt/vmckpt/node-agent/supervise"
)

func main() {
	asHelper()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	p := &program{
		stdout:   os.Stdout,
		stderr:   os.Stderr,
		getenv:   os.Getenv,
		now:      time.Now,
		terminal: term.IsTerminal(int(os.Stderr.Fd())),
		columns: func() int {
			columns, _, err := term.GetSize(int(os.Stderr.Fd()))
			if err != nil {
				return 0
			}
			return columns
		},
		signals: signals,
	}
	os.Exit(p.run(context.Background(), os.Args[1:]))
}

// asHelper does not return where this process was started as one of the program's helpers: the leash's holder, the injection
// helper, a worker. All of them are this binary.
func asHelper() {
	guard.Main()
	inject.Main()
	supervise.Main(jobs.All(), func(err error) string { return string(jobs.CodeOf(err)) })
}
