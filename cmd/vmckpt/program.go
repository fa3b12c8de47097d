package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/vmckpt/vmckpt/image"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// program is one invocation: what it takes from its surroundings, and the flags that every command has.
type program struct {
	stdout, stderr io.Writer
	getenv         func(string) string
	now            func() time.Time
	terminal       bool       // stderr is one
	columns        func() int // that it has
	signals        <-chan os.Signal

	output     outputFormat
	progress   progressStyle
	repository string
	keyFile    string

	called  string // the command, with those above it
	began   bool   // the arguments were understood, and the command's own work began
	workers workers
}

// The environment variables that stand for flags.
const (
	repositoryVariable = "VMCKPT_REPO"
	keyVariable        = "VMCKPT_KEY"
)

// run does what the arguments say and returns the exit code.
func (p *program) run(ctx context.Context, args []string) int {
	p.output, p.progress = outputText, progressAuto
	stdout := &answerWriter{Writer: p.stdout}
	p.stdout = stdout
	ctx, stop := p.interruptible(ctx)
	defer stop()
	root := p.command()
	root.SetArgs(args)
	c, err := root.ExecuteContextC(ctx)
	if err == nil && stdout.err != nil {
		p.complain(fmt.Errorf("write the answer: %w", stdout.err))
		p.tell("hint: what was asked for is done; its answer is not whole\n")
		return exitUnexpected
	}
	if err == nil {
		return 0
	}
	p.called = c.CommandPath()
	if !p.began {
		p.findOutput(args) // what it could not understand it says in several lines
		err = &usageError{errors.New(strings.Join(strings.Fields(mistyped(err).Error()), " "))}
	}
	return p.fail(err)
}

// wanted says what a flag wants whose value others parse, by its type; "" where its own error says so.
func wanted(flagType string) string {
	switch flagType {
	case "bool":
		return "true or false"
	case "duration":
		return "a time such as 5ms, 2s or 1h"
	case "int":
		return "a number"
	case "stringToString":
		return "KEY=VALUE"
	}
	return ""
}

// mistyped says of a flag's value that could not be parsed what it should be, in place of what Go's parsers say.
func mistyped(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	f := invalid.GetFlag()
	if want := wanted(f.Value.Type()); want != "" {
		return fmt.Errorf("--%s %s: want %s", f.Name, invalid.GetValue(), want)
	}
	return fmt.Errorf("--%s %s: %w", f.Name, invalid.GetValue(), invalid.Unwrap())
}

// findOutput looks for --output among arguments that could not be understood, whether or not it stands behind what could not be.
func (p *program) findOutput(args []string) {
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.ParseErrorsAllowlist.UnknownFlags = true
	f.SetOutput(io.Discard)
	f.VarP(&p.output, "output", "o", "")
	f.BoolP("help", "h", false, "")
	f.Parse(args) //nolint:errcheck // there is one to tell of already
}

// command returns the whole tree of commands.
func (p *program) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "vmckpt",
		Short: "Checkpoints of running QEMU machines: take, look after and restore them",
		Long: `vmckpt takes checkpoints of running QEMU machines, memory included, while the guest goes on, and restores them.

Checkpoints are images in a repository, a directory. The first one of a machine is a base; those after it are
increments that hold what changed. Each can be restored, and deleted, without the others.`,
		Example: `  vmckpt init --repo /srv/checkpoints --key /etc/vmckpt.key
  vmckpt capture web --repo /srv/checkpoints --key /etc/vmckpt.key
  vmckpt list --repo /srv/checkpoints --key /etc/vmckpt.key`,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(*cobra.Command, []string) {
			p.began = true
		},
		RunE: func(c *cobra.Command, _ []string) error {
			if p.output == outputJSON { // help is none
				return &usageError{errors.New("which command? None is named")}
			}
			return c.Help()
		},
	}
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.PersistentFlags().VarP(&p.output, "output", "o", "text, or json: one value on standard output")
	root.PersistentFlags().Var(&p.progress, "progress", "bar, plain (lines) or none; auto: a bar on a terminal, else none")
	completeFlag(root, "output", words(string(outputText), string(outputJSON)))
	completeFlag(root, "progress", words(string(progressAuto), string(progressBar), string(progressPlain), string(progressNone)))
	root.AddCommand(
		p.initCommand(), p.captureCommand(), p.restoreCommand(), p.listCommand(), p.showCommand(), p.verifyCommand(),
		p.deleteCommand(), p.sweepCommand(), p.releaseCommand(), p.machinesCommand(),
	)
	root.SetHelpCommand(helpCommand())
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" { // by itself it takes any word, and prints its help
			c.RunE = func(c *cobra.Command, args []string) error {
				if len(args) > 0 {
					return &usageError{fmt.Errorf("no completion script for %q: want bash, zsh, fish or powershell", args[0])}
				}
				return c.Help()
			}
			c.Args = cobra.ArbitraryArgs
		}
	}
	return root
}

// helpCommand is cobra's help, but for that what there is no help on is an error.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Explain a command",
		RunE: func(c *cobra.Command, args []string) error {
			on, rest, err := c.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return &usageError{fmt.Errorf("no help on %q: there is no such command", strings.Join(args, " "))}
			}
			on.InitDefaultHelpFlag()
			return on.Help()
		},
	}
}

// version says which source this was built from, as far as the Go toolchain has noted it.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}

// repositoryFlags adds the flags that say which repository is meant.
func (p *program) repositoryFlags(c *cobra.Command) {
	c.Flags().StringVar(&p.repository, "repo", p.getenv(repositoryVariable), "`DIR` of the repository (default $"+repositoryVariable+")")
	c.Flags().StringVar(&p.keyFile, "key", p.getenv(keyVariable), "`FILE` with the repository's keys (default $"+keyVariable+")")
	// A default from the environment is for this user on this day, and not for the help text.
	c.Flags().Lookup("repo").DefValue, c.Flags().Lookup("key").DefValue = "", ""
}

// repositoryRequest returns what the flags say of the repository.
func (p *program) repositoryRequest() (jobs.Repository, error) {
	switch {
	case p.repository == "":
		return jobs.Repository{}, &usageError{fmt.Errorf("which repository? Name its directory with --repo or %s", repositoryVariable)}
	case p.keyFile == "":
		return jobs.Repository{}, &usageError{fmt.Errorf("which keys? Name the key file with --key or %s", keyVariable)}
	}
	return jobs.Repository{Dir: p.repository, KeyFile: p.keyFile}, nil
}

// open opens the repository that the flags name.
func (p *program) open() (*image.Repository, error) {
	r, err := p.repositoryRequest()
	if err != nil {
		return nil, err
	}
	return r.Open()
}

// look opens the repository and closes it again, so that what is wrong with it or its keys is told before a worker begins.
func (p *program) look() error {
	r, err := p.open()
	if err != nil {
		return err
	}
	return r.Close()
}

// exactly refuses any other number of arguments than those named.
func exactly(names ...string) cobra.PositionalArgs { return between(len(names), names...) }

// between refuses fewer arguments than least and more than are named.
func between(least int, names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < least {
			return fmt.Errorf("%s is missing", names[len(args)])
		}
		if len(args) > len(names) {
			return fmt.Errorf("%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

// atLeastOne refuses no arguments at all.
func atLeastOne(name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return fmt.Errorf("%s is missing", name)
		}
		return nil
	}
}

// argument returns an argument that may be missing.
func argument(args []string, n int) string {
	if n < len(args) {
		return args[n]
	}
	return ""
}

// recordDirFlag adds the flag that says where session records are kept.
func recordDirFlag(c *cobra.Command, dir *string) {
	c.Flags().StringVar(dir, "record-dir", dirty.DefaultRecordDir, "`DIR` where this host keeps what it knows of tracked machines")
}
