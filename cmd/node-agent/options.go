package main

import (
	"errors"
	"fmt"

	"github.com/spf13/pflag"

	"github.com/vmckpt/vmckpt/cmd/internal/settings"
	"github.com/vmckpt/vmckpt/node-agent/dirty"
)

// options are the agent's settings.
type options struct {
	settings.Common
	NodeName  string
	Slots     int
	RunDir    string
	RecordDir string
	HostRoot  string
	Witness   bool

	OtherNamespaces bool
}

func parseOptions(args []string, getenv func(string) string) (*options, error) {
	o := &options{}
	flags := pflag.NewFlagSet("node-agent", pflag.ContinueOnError)
	flags.StringVar(&o.NodeName, "node-name", getenv("NODE_NAME"), "the node that this agent is on, by its name in the cluster (NODE_NAME)")
	flags.IntVar(&o.Slots, "slots", 2, "how many machines are worked on at once")
	flags.StringVar(&o.RunDir, "run-dir", "/run/vmckpt-agent", "the agent's own directory, in memory")
	flags.StringVar(&o.RecordDir, "record-dir", dirty.DefaultRecordDir, "where the node keeps session records, in memory")
	flags.BoolVar(&o.Witness, "witness", false, "keep KVM's dirty log of machines and compare it with the page tables at each checkpoint")
	flags.StringVar(&o.HostRoot, "host-root", "/", "where this process sees the node's root directory")
	flags.BoolVar(&o.OtherNamespaces, "allow-other-namespaces", false,
		"images of machines of any namespace may be imported and restored by any that has a claim on their volume: for repositories from a cluster with other namespaces")
	o.AddTo(flags, getenv)
	if err := o.Parse(flags, args); err != nil {
		return nil, err
	}
	switch {
	case o.NodeName == "":
		return nil, errors.New("which node is this? give --node-name or NODE_NAME")
	case o.Slots < 1:
		return nil, fmt.Errorf("%d slots: want one at the least", o.Slots)
	}
	return o, nil
}
