package agent

import (
	"context"
	"fmt"

	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
	"github.com/vmckpt/vmckpt/node-agent/jobs"
)

// A volume of the node's own file system is a directory. Where something is to be mounted there and is not, it is another directory, empty most
// often, on the node's root disk; and Kubernetes does not say of a local volume whether it is a mount point. So what the checkpoints of a claim
// say counts: where one has an image there, its repository is there, by its id, or the volume is not. A repository is made only on a claim that
// no checkpoint has an image on.

// repositoryDir is the directory of a claim's volume in which the repository lies.
const repositoryDir = "vmckpt"

// repositoryOn is the repository of a claim's volume. id is empty where it is not known.
func repositoryOn(volume, id, keyFile string) jobs.Repository {
	return jobs.Repository{Volume: volume, Dir: repositoryDir, ID: id, KeyFile: keyFile}
}

// find looks for an image by one key after the other, and returns the key file that fits.
func (a *Agent) find(ctx context.Context, volume, id string, keys keyFiles, look jobs.ImageRequest, progress func(jobs.VerifyProgress)) (*jobs.ImageResult, string, error) {
	return tryKeys(keys, func(keyFile string) (*jobs.ImageResult, error) {
		look.Repository = repositoryOn(volume, id, keyFile)
		return a.o.Engine.Image(ctx, look, progress)
	})
}

// knownRepository returns the id of the repository on a claim, by its checkpoints that a reader has. It is empty where none says it; used says whether
// one has an image there at all.
func (a *Agent) knownRepository(ctx context.Context, from client.Reader, namespace, claim string) (id string, used bool, err error) {
	var list vmckptv1.VMCheckpointList
	if err := from.List(ctx, &list, client.InNamespace(namespace), client.UnsafeDisableDeepCopy); err != nil {
		return "", false, fmt.Errorf("list the checkpoints on claim %s: %w", claim, err)
	}
	var newest *vmckptv1.VMCheckpoint
	for i := range list.Items {
		o := &list.Items[i]
		if o.Status.Image == nil || o.Spec.Storage.ClaimName != claim {
			continue
		}
		used = true
		if o.Status.Image.Repository != "" && (newest == nil || newest.CreationTimestamp.Before(&o.CreationTimestamp)) {
			newest = o
		}
	}
	if newest != nil {
		id = newest.Status.Image.Repository
	}
	return id, used, nil
}
